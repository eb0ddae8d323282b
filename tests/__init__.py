"""The tests, by what they need; `support` is what they share."""
