"""What an adapter does: predictions, metrics of the field's libraries, retention."""
