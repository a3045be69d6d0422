"""A page of this machine: one asks a student, sees its answer beside the teacher's with the red pen in it, has it
revised, and keeps what is good as data.

`turn` is one question and its answers, `pairs` the file that they go to, `page` the page (gradio is imported there
and nowhere else), `server` what serves it to this machine alone.
"""
