"""What all tests share: helpers in `support.py` beside this file, reproducible hypothesis runs, one thread."""

import torch
from hypothesis import settings

settings.register_profile("merganser", derandomize=True, database=None, deadline=None)
settings.load_profile("merganser")
torch.set_num_threads(1)  # small matrices: more threads only wait for each other
