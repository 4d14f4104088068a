"""The same as `jaxpt teacher_logits`."""

from jaxpt.cli.main import main

if __name__ == "__main__":
    main("teacher_logits")
