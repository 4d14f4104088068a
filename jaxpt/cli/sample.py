r"""Talk with a model: it continues what you type, or answers you.

A model whose tokenizer has a chat template answers in it and remembers the conversation; others
continue each text by itself.

    jaxpt sample --model runs/base
    jaxpt sample --model runs/base/checkpoints/60 --prompt 'The ship' --temperature 0
"""

import argparse

from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--model",
        required=True,
        type=options.parse_path,
        metavar="DIR",
        help="a run, a checkpoint step directory, a Hugging Face directory, an adapter or hf:NAME",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="print what follows this text, and nothing else"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="continue the text as it is, also where the model has a chat template",
    )
    parser.add_argument(
        "--max-new", type=int, default=256, metavar="N", help="new tokens at most (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="temperature of sampling; 0 is greedy (default: 0.8)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="X",
        help="sample from the likeliest tokens that sum to this probability (default: 0.95)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer --prompt, or what is typed."""
    from jaxpt.evaluate import talk
    from jaxpt.model.decode import Sampling

    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p)
    settings = talk.AnswerSettings(sampling, arguments.max_new, arguments.seed)
    talk.talk(arguments.model, arguments.prompt, settings, is_plain=arguments.plain)
