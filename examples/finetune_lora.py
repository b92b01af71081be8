"""Adapt a trained model to a new area or to new classes by LoRA: `co2s finetune` as a script.

    # Train on the labelled images alone.
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder

    # Train on the unlabelled images, too.
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --method co2s

    # Also write base and adapter as one plain model, into merged/.
    accelerate launch examples/finetune_lora.py --checkpoint user/name --data_dir path/to/folder --merge

`--help` shows more commands and lists every flag.
"""

from co2s_hf.cli.finetune import main


if __name__ == "__main__":
    main()
