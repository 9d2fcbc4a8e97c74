"""Parts of tests against a live server, this project's and yours: images, prompts, servers, and what their logs say.

    from tgvkv_sglang.testing.images import make_image
    from tgvkv_sglang.testing.prompts import about_images, chat
    from tgvkv_sglang.testing.server import launch

    with launch(model, directory, "--attention-backend", "tgvkv", "--tgvkv-retention", "0.1") as server:
        answer = server.generate(chat(about_images("What is it?")), [make_image(0)], max_new_tokens=16)
        print(answer.text, answer.cached, server.memory())

Needs neither pytest nor anything else beyond the package's own dependencies; docs/testing.md has an example.
"""
