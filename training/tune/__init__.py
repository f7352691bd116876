"""The search for hyper-parameters: quality against what a lone row and the model's size cost, by Optuna.

A trial is a walk over every fold but the last: the model that is published is judged on that one, and a search that
had seen it would choose by luck. Trials are kept in a journal or a database that another run of the study goes on from.
"""
