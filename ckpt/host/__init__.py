"""Processes: the only room that starts them."""
