"""Plugins for other programs. Each module requires the program it is named after."""
