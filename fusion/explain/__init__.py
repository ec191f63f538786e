"""Which expert took which token, layer by layer, and why: of one prompt, or of any conversations with their answers.

qwen-fusion explain configs/demo.yaml "Return JSON: name: Ann; age: 30" --html out.html
"""
