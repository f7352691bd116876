"""Making models smaller: distillation, pruning, truncation and quantization, chained by a recipe and judged by gates.

Every step is fitted in every walk-forward fold and measured on the same rows and in the same runtime as its teacher; a
step that passes is a child bundle, one that does not is a row of the report and nothing else.
"""
