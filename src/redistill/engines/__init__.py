"""Who writes the student's answers: our own loop, or one of the engines here, behind one interface.

`writer.py` is the interface, `choose.py` picks by `rollout.engine`; every other file is one engine or a part of one.
"""
