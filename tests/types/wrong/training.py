"""What is wrong of checkpoints, early stopping, trackers, services and supervised engines."""

import torch
from torch import nn

from aengine import Checkpoint, Engine, Events, Service, StopReason, stop_on_signals
from aengine.handlers import EarlyStopping
from aengine.loggers import JSONLines, Tracker
from aengine.training import create_supervised_trainer

model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)

create_supervised_trainer(model, optimizer, amp_mode="amp")  # error: call-arg, reportCallIssue
create_supervised_trainer(model, optimizer, autocast_dtype="bfloat16")  # error: arg-type, reportArgumentType
trainer.state.output.shape.foo()  # error: union-attr, reportAttributeAccessIssue
EarlyStopping(3, "accuracy", mode="maximum")  # error: arg-type, reportArgumentType
EarlyStopping(3, "accuracy", mode="max").attach(model)  # error: arg-type, reportArgumentType
Checkpoint("checkpoints", model, on_error="warn")  # error: arg-type, reportArgumentType
Checkpoint("checkpoints", model, when_busy="queue")  # error: arg-type, reportArgumentType
Tracker(3)  # error: arg-type, reportArgumentType
Tracker(JSONLines("log.jsonl"), on_error="warn")  # error: arg-type, reportArgumentType
Tracker(JSONLines("log.jsonl")).attach(Events.STARTED, trainer)  # error: arg-type, reportArgumentType
stop_on_signals("trainer")  # error: arg-type, reportArgumentType


def reached() -> StopReason:  # error: return, reportReturnType
    with stop_on_signals(trainer):  # which may swallow
        return StopReason.COMPLETED


class Wrong(Service):
    def serve(self, engine: Engine) -> int:  # error: override, reportIncompatibleMethodOverride
        return 3
