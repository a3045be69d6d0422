"""How good a model is: answers with several seeds, ROUGE-L, divergence from the teacher, speed.

`rouge` and `score` are arithmetic on text and numbers; `harness` runs the models. Nothing is imported here:
the command line draws a table without loading torch.
"""
