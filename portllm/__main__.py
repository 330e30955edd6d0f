"""`python -m portllm` is the command `portllm`."""

from portllm.cli import main

main()
