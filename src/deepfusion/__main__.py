# SPDX-License-Identifier: Apache-2.0
"""`python -m deepfusion`: the command line, where the `deepfusion` command is not on the path."""

from deepfusion.cli import main

main()
