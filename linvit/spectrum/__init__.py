"""How many dimensions attention needs: `linvit spectrum`, `linvit.attention_spectrum` and `linvit.plan_k`.

capture takes queries and keys out of a model, matrix makes attention matrices of them, singular their singular values;
measure averages these over images into a result; plan and cost choose k per layer; table and plot show, command joins.
"""
