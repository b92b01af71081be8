"""Open a page in the browser: drop an aerial or satellite image to see its land cover and the model's confidence.

The same as `co2s demo`.

    pip install "co2s_hf[demo]"
    python examples/app.py --checkpoint outputs/train_semi/model

    # A published model.
    python examples/app.py --checkpoint user/name

The page runs on a CPU, too. Only this machine can open it unless --share is given. It shows the images that are dropped
on it and no other file of the disk. `co2s push --space` publishes the page as a Space.
"""

from co2s_hf.cli.demo import main


if __name__ == "__main__":
    main()
