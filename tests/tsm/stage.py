"""A stage whose configfs-tsm is elsewhere: `python tests/tsm/stage.py FOLDER --manifest … --index …`.

Nothing of the stage is changed but that folder's path.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    from attest import tsm
    from minigpt.stage.__main__ import main as serve

    tsm.FOLDER = sys.argv.pop(1)
    serve()


if __name__ == "__main__":
    main()
