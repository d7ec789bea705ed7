"""Training with torch: supervised steps, metrics, schedules, averages of weights. One module each.

update         gradients of a loss, gathered, clipped and stepped on
supervised     `create_supervised_trainer`, `create_supervised_evaluator`, and their steps
moving         batches copied to a GPU beside the step
metrics        torchmetrics' metrics on an engine (extra `training`)
schedules      torch's learning-rate schedulers on an engine
averages       torch's averages of weights on an engine
gradients      what gradients, weights and updates look like
lr_range_test  which learning rate to begin with
"""
