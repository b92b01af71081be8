"""Adapt a trained model to a new area or to new classes, with a handful of labels, by LoRA.

The same as `co2s finetune`.

    # On the labelled images alone.
    python examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder

    # On the unlabelled images, too.
    python examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --method co2s

    # The smallest adapter, and a larger one.
    python examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --freeze_decoders
    python examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --lora_rank 32 --lora_targets attention+mlp

    # Also one plain model of base and adapter, in merged/. Publish the adapter.
    python examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --merge
    python examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --push_to_hub --hub_model_id user/name-valley

The command evaluates before and after, and writes what `co2s train` writes, with adapter/ instead of model/. `co2s
evaluate`, `predict`, `demo`, `from_pretrained` and `pipeline` take the adapter like a model, as long as its base stays
where it was. The data may have other classes than the base: their queries start from random values, their text is
encoded by the base's own text encoder, and the decoders keep their weights.
"""

from co2s_hf.cli.finetune import main


if __name__ == "__main__":
    main()
