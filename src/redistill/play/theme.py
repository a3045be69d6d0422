"""gradio's own parts in the report's colours and letters, light and dark."""

from __future__ import annotations

from typing import Any

# What gradio calls a thing, and what it is made of (`report/assets/colours.css`).
_PARTS = {
    "body_background_fill": "var(--bg)",
    "body_text_color": "var(--ink)",
    "body_text_color_subdued": "var(--muted)",
    "background_fill_primary": "var(--paper)",
    "background_fill_secondary": "var(--faint)",
    "border_color_primary": "var(--line)",
    "border_color_accent": "var(--accent)",
    "color_accent_soft": "var(--faint)",
    "link_text_color": "var(--accent)",
    "block_background_fill": "var(--paper)",
    "block_border_color": "var(--line)",
    "block_label_background_fill": "var(--paper)",
    "block_label_text_color": "var(--muted)",
    "block_title_text_color": "var(--muted)",
    "block_info_text_color": "var(--muted)",
    "input_background_fill": "var(--paper)",
    "input_background_fill_focus": "var(--paper)",
    "input_border_color": "var(--line)",
    "input_border_color_focus": "var(--accent)",
    "input_placeholder_color": "var(--muted)",
    "button_primary_background_fill": "var(--accent)",
    "button_primary_background_fill_hover": "var(--accent)",
    "button_primary_border_color": "var(--accent)",
    "button_primary_text_color": "var(--bg)",
    "button_secondary_background_fill": "var(--paper)",
    "button_secondary_background_fill_hover": "var(--faint)",
    "button_border_width": "1px",
    "button_large_radius": "8px",
    "button_large_text_size": "14px",
    "button_large_text_weight": "550",
    "button_large_padding": "7px 22px",
    "block_radius": "12px",
    "input_radius": "8px",
    "button_secondary_border_color": "var(--line)",
    "button_secondary_text_color": "var(--ink)",
    "checkbox_label_background_fill": "var(--paper)",
    "checkbox_label_background_fill_hover": "var(--faint)",
    "checkbox_label_background_fill_selected": "var(--faint)",
    "checkbox_label_text_color": "var(--ink)",
    "checkbox_label_text_color_selected": "var(--ink)",
    "checkbox_background_color_selected": "var(--accent)",
    "slider_color": "var(--accent)",
    "shadow_drop": "none",
    "shadow_drop_lg": "none",
    "block_shadow": "none",
    "input_shadow": "none",
    "input_shadow_focus": "none",
    "button_primary_shadow": "none",
    "button_secondary_shadow": "none",
}
_LETTERS = (
    "Inter",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
)
_TYPED = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def colours(gr: Any) -> Any:
    """The theme: no letters are fetched, and the two schemes differ in our own variables alone."""
    theme = gr.themes.Base(font=list(_LETTERS), font_mono=list(_TYPED))
    known = theme.set.__code__.co_varnames
    both = _PARTS | {f"{name}_dark": value for name, value in _PARTS.items()}
    return theme.set(**{name: value for name, value in both.items() if name in known})
