"""The parent process's input and output: rendered files, the launched process, the ledger."""
