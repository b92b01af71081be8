"""Publish a trained model on the Hub, or a demo of it: `co2s push` as a script.

    # `hf auth login` first. The model's folder has its card from the training.
    python examples/push_to_hub.py --checkpoint outputs/train_semi/model --hub_model_id user/name --hub_private_repo

    # With the handler of Inference Endpoints; on a branch.
    python examples/push_to_hub.py --checkpoint outputs/train_semi/model --hub_model_id user/name --handler --hub_revision v1

    # A Space: the page of `co2s demo` for a published model.
    python examples/push_to_hub.py --checkpoint user/name --space user/demo

    # The same Space as a local folder, to look at it first.
    python examples/push_to_hub.py --checkpoint user/name --space_dir outputs/space

All files arrive in one commit, or none does. The local folder is only read; a missing card or handler is first written
into it.
"""

from co2s_hf.cli.push import main


if __name__ == "__main__":
    main()
