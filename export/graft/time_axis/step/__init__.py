"""Turns a program into one cached step."""
