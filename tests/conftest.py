"""What every test stands on: one thread for each process, as two workers share two cores."""

import os

# before torch is imported, here and in every process that a test starts
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
