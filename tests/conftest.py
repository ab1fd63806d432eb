"""The two workers of pytest.ini run beside each other, so each gets one thread; set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
