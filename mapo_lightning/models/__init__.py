"""World model and agent: plain torch modules that see tensors, never files, words or simulators.

Shape legend: B batch, T time, C H W image, E embed, D deter, S groups, K classes,
F feat, A action, M codes, Z code width, V semantic vector, N imagination starts, I imagined steps,
U hidden units, G heads, L tokens.
"""
