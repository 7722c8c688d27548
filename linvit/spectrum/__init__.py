"""How many dimensions attention needs: `linvit spectrum`, `linvit.attention_spectrum` and `linvit.plan_k`.

`capture` records queries and keys while a model runs, and finds the singular values of their attention matrices;
`measure` averages these over images; `result` is the spectrum. `plan` chooses k per layer, and `show` presents both.
"""
