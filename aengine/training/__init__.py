"""Training with torch: supervised steps, metrics, schedules, averages of weights. One module each.

update         from a loss to a step of the optimizer: accumulation, clipping
supervised     `create_supervised_trainer`, `create_supervised_evaluator`, and their steps
moving         batches copied to a GPU beside the step
metrics        torchmetrics' metrics on an engine (extra `training`)
schedules      torch's learning-rate schedulers on an engine
averages       torch's averages of weights on an engine
gradients      statistics of gradients, weights and updates
lr_range_test  a learning rate to begin with
"""
