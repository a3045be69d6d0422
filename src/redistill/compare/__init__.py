"""Several methods, one budget, one table, in this order.

`plan` and `search` say what is asked; `child` is one run, `jobs` their processes, `runs` and `trials` all of them;
`lines` is what came out, `verdicts` what a judge says, `table` how it is shown; `command` is the whole.
"""
