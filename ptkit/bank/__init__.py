"""Many adapters on one frozen base: kept in tiers, swapped, mixed in a batch, composed."""

from ptkit.bank.bank import AdapterBank
from ptkit.bank.conversation import Conversation, ConversationTurn
from ptkit.bank.resident import RowNames
from ptkit.bank.slots import SlotTable
from ptkit.bank.source import name_of
from ptkit.bank.store import AdapterStatus, BankCounts

__all__ = [
    "AdapterBank",
    "AdapterStatus",
    "BankCounts",
    "Conversation",
    "ConversationTurn",
    "RowNames",
    "SlotTable",
    "name_of",
]
