"""Two problems of which one decides inside the other, solved by cutting planes, a penalty, or neither. NumPy only.

    min over x, y of F(x, y)    such that    y is a minimiser of f(x, .)

x are the edge adapter's numbers, y the prompt's. F is the final loss on held-out requests, f what the prompt answers
for.
"""
