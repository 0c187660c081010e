"""Studies of the estimators: what `scripts/estimators.py` measures, keeps and writes down, a question a room.

    cells       what a study is made of: cells, computed one by one and kept in a JSON file
    agreement   estimators, designs and distributions against closed forms, quadrature and brute force
    coverage    how often intervals hold the truth
    cost        error against forward passes and seconds, on networks of 100,000 parameters
    limits      small ranges and scales
    page        the page and its plots, from the JSON file alone

They use the oracles of `tests`, which share no code with the library.
"""
