"""Prompts and images on their way from rows of a data set to the backend that generates."""

from sapo_trl.trainer.trl.generation import with_image_lists


class TestImageLists:
    def test_rows_without_an_empty_cell_stay(self):
        for rows in ([{"prompt": "a"}], [{"image": "x"}, {"image": "y"}], [{"images": []}, {"images": ["x"]}]):
            assert with_image_lists(rows) is rows

    def test_an_empty_cell_becomes_an_empty_list(self):
        assert [row["images"] for row in with_image_lists([{"images": None}, {"images": ["x"]}])] == [[], ["x"]]
        assert [row["images"] for row in with_image_lists([{"image": None}, {"image": "x"}])] == [[], ["x"]]

    def test_an_empty_column_leaves_the_other_columns_images(self):
        rows = [{"images": ["x", "y"], "image": None}, {"images": ["z"], "image": None}]
        assert [row["images"] for row in with_image_lists(rows)] == [["x", "y"], ["z"]]
        rows = [{"images": None, "image": "x"}, {"images": None, "image": None}]
        assert [row["images"] for row in with_image_lists(rows)] == [["x"], []]
