"""Train both Co2S students on a few labelled and many unlabelled images: `co2s train` as a script to read and change.

    # Try everything out with the aerial images and the small pretrained backbones of this package: minutes on a CPU.
    accelerate launch examples/train_semi.py

    # Your folder with images/ and labels/. Draw the sets: one training image in eight keeps its labels.
    accelerate launch examples/train_semi.py --data_dir path/to/folder --labeled_fraction 1/8

    # Several GPUs and the pretrained backbones of the paper.
    accelerate launch --multi_gpu --mixed_precision bf16 examples/train_semi.py --data_dir path/to/folder \\
        --clip_model openai/clip-vit-base-patch16 --dinov3_model facebook/dinov3-vitb16-pretrain-lvd1689m \\
        --crop_size 256 --per_device_train_batch_size 2 --num_train_epochs 80 --eval_epochs 5

    # Continue after an interruption, with the same options.
    accelerate launch examples/train_semi.py --resume_from_checkpoint last

`--help` lists every flag. To change the training itself, replace `main()` with the calls inside it:

    from co2s_hf.data.options import DataOptions
    from co2s_hf.training.loop import setup, train
    from co2s_hf.training.options import TrainingOptions

    run = setup(TrainingOptions(output_dir="outputs/mine", max_train_steps=200), DataOptions(data_dir="my_data"))
    trained = train(run)  # from_pretrained loads trained.folder; trained.evaluation has the scores

The loop is in `co2s_hf/training/loop.py`. Copy `train` and `training_step` from there, and change them.
"""

from co2s_hf.cli.train import main


if __name__ == "__main__":
    main()
