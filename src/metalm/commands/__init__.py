"""The subcommands of `metalm`, by the job that they do."""
