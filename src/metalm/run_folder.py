"""Names inside a run's folder that both the run and those who look at it from outside use."""

STOP_NAME = "stop"
"""While this file is there, the run is asked to save and end."""

ANSWERED_STOP_NAME = "stop_answered"
"""In `logs/`: the stop file that the run has last ended for. A batch script starts such a run no more."""

LOCK_NAME = "lock"
"""Held by the process that trains the run; see `run_lock`."""

LOGS_NAME = "logs"
"""The folder of what the run and its batch scripts say."""

SUBMITTED_NAME = "submitted"
"""Holds a folder for each submission of the run to Slurm, with the config and the code of the job."""

TEMPLATE_NAME = "template"
"""Beside the config of a submission: the name of the batch script."""

TRAINING_TEMPLATES = ("pretrain.sbatch", "finetune.sbatch")
"""Batch scripts that start the run; others evaluate or convert it."""

COMMIT_NAME = "COMMIT"
"""Beside the `src/` of a snapshot: the git commit it was taken from."""
