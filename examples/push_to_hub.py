"""Publish a trained model on the Hub, or a demo of it: `co2s push` as a script.

    # `hf auth login` first.
    python examples/push_to_hub.py --checkpoint outputs/train_semi/model --hub_model_id user/name --hub_private_repo

    # Publish the page of `co2s demo` as a Space, for a published model.
    python examples/push_to_hub.py --checkpoint user/name --space user/demo

`--help` shows more commands and lists every flag.
"""

from co2s_hf.cli.push import main


if __name__ == "__main__":
    main()
