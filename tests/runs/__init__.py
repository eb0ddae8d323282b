"""Whole trainings with verl, and an engine that serves what they export."""
