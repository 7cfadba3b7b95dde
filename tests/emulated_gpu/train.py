"""dsvae/train.py on the emulated GPU."""

import emulated

from dsvae import train

emulated.install()
train.end_process(train.main())
