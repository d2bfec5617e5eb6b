"""Datasets, templates and the examples a task is made of."""

from ptkit.data.examples import Example
from ptkit.data.general_text import general_texts
from ptkit.data.task import TaskData, load_task

__all__ = ["Example", "TaskData", "general_texts", "load_task"]
