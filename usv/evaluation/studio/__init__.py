"""A page to play with: a prompt, a budget, and dense | student side by side. `python -m usv.studio`.

    stage.py   what is asked and made: clips, seconds, executed density, the plan; knows no page
    page.py    the page around it, in gradio
"""
