"""Who the student learns from: one interface (`signal.py`), and the teachers behind it."""
