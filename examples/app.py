"""Serve a page for the browser to try a model on images: `co2s demo` as a script.

    pip install -c constraints.txt -e ".[demo]"
    python examples/app.py --checkpoint outputs/train_semi/model

`--help` lists every flag.
"""

from co2s_hf.cli.demo import main


if __name__ == "__main__":
    main()
