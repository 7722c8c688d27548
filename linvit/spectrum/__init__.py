"""How many dimensions attention needs: `linvit spectrum`, `linvit.attention_spectrum` and `linvit.plan_k`.

`capture` records queries and keys while a model runs, `matrix` finds the singular values of their attention matrices,
and `measure` averages these over images; `result` is the spectrum. `plan`, with `knapsack`, chooses k per layer.
`show` and `plot` present both.
"""
