"""How good a model is: answers with several seeds, ROUGE-L, divergence from the teacher, variety, exposure bias.

`rouge`, `score`, `exposure` and `significance` are arithmetic on text and numbers; `suites` are the sets;
`harness` runs the models, with `answers` and `readings`; `judge` lets a model compare the answers of two (`pairs`);
`kept` lets both go on after a kill. Nothing is imported here: the command line draws a table without loading torch.
"""
