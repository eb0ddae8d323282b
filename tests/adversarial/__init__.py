"""Damage, hostile content, kills, faults, hangs and slips."""
