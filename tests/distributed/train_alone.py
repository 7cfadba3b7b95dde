"""dsvae/train.py that trains and exports nothing, and evaluates nothing."""

from dsvae import train

train._validate = lambda *_: 0.0
train.finish = lambda *_: {}
train.finished_text = lambda *_: ""
train.end_process(train.main())
