//! How series are told apart: by color, by dashes, and by markers.

use super::svg::{Point, Svg, coordinate, path};

/// Okabe and Ito's colors, which color-blind readers can tell apart. Yellow is left out, orange and
/// sky blue are darker, for a contrast of 3 on white and on dark paper; black is the color of text.
const COLORS: [&str; 7] = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "currentColor",
    "#c28500",
    "#3d97cc",
];

/// As many as have no common divisor with the number of markers, so that 30 series differ in print.
const DASHES: [&str; 5] = ["none", "8 4", "2 3", "9 3 2 3", "14 5"];

/// Corners of markers in units of their size; none for a circle.
const MARKERS: [&[Point]; 6] = [
    &[],
    &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    &[(0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
    &[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
    &[(0.0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
    &[
        (-0.4, -1.3),
        (0.4, -1.3),
        (0.4, -0.4),
        (1.3, -0.4),
        (1.3, 0.4),
        (0.4, 0.4),
        (0.4, 1.3),
        (-0.4, 1.3),
        (-0.4, 0.4),
        (-1.3, 0.4),
        (-1.3, -0.4),
        (-0.4, -0.4),
    ],
];

/// Size of markers in pixels from the middle.
const SIZE: f64 = 3.6;

/// The looks of one series.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mark {
    /// Of line and marker.
    pub color: &'static str,
    /// Lengths of dashes and gaps, or `none`.
    pub dash: &'static str,
    corners: &'static [Point],
}

impl Mark {
    /// Width of a sample in pixels.
    pub const SAMPLE: f64 = 34.0;

    /// The looks of the series with this number; they repeat after 210.
    pub fn new(index: usize) -> Self {
        Self {
            color: COLORS[index % COLORS.len()],
            dash: DASHES[index % DASHES.len()],
            corners: MARKERS[index % MARKERS.len()],
        }
    }

    /// Path data of the marker at a point.
    pub fn outline(&self, (x, y): Point) -> String {
        if self.corners.is_empty() {
            return circle((x, y), SIZE);
        }
        let corners = self.corners.iter();
        path(corners.map(|(dx, dy)| (x + dx * SIZE, y + dy * SIZE))) + " Z"
    }

    /// A piece of line with a marker, as wide as [`Mark::SAMPLE`].
    pub fn sample(&self, svg: &mut Svg, (x, y): Point) {
        let end = (x + Self::SAMPLE, y);
        let stroke = [
            ("stroke", self.color),
            ("stroke-width", "2"),
            ("stroke-dasharray", self.dash),
        ];
        svg.line((x, y), end, &stroke);
        let middle = (x + Self::SAMPLE / 2.0, y);
        svg.path(&self.outline(middle), &[("fill", self.color)], "");
    }
}

/// Path data of a circle.
pub fn circle((x, y): Point, radius: f64) -> String {
    let (r, across) = (coordinate(radius), coordinate(2.0 * radius));
    let start = path([(x - radius, y)]);
    format!("{start} a{r} {r} 0 1 0 {across} 0 a{r} {r} 0 1 0 -{across} 0 Z")
}

#[cfg(test)]
mod tests {
    use super::super::page;
    use super::*;
    use std::collections::BTreeSet;

    /// Relative luminance of `#rrggbb`, as the Web Content Accessibility Guidelines define it.
    fn luminance(color: &str) -> f64 {
        let part = |from: usize| {
            let byte = u8::from_str_radix(&color[from..from + 2], 16).unwrap();
            let share = f64::from(byte) / 255.0;
            if share <= 0.040_45 {
                share / 12.92
            } else {
                ((share + 0.055) / 1.055).powf(2.4)
            }
        };
        0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5)
    }

    fn contrast(a: &str, b: &str) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn colors_are_seen_on_light_and_on_dark_paper() {
        assert!((contrast("#000000", "#ffffff") - 21.0).abs() < 1e-9);
        for color in COLORS.into_iter().filter(|c| c.starts_with('#')) {
            for paper in [page::LIGHT, page::DARK] {
                assert!(contrast(color, paper) >= 3.0, "{color} on {paper}");
            }
        }
    }

    #[test]
    fn thirty_series_differ_without_color() {
        let looks = |i| (Mark::new(i).dash, Mark::new(i).outline((0.0, 0.0)));
        let distinct: BTreeSet<_> = (0..30).map(looks).collect();
        assert_eq!(distinct.len(), 30);
        let colors: BTreeSet<_> = (0..7).map(|i| Mark::new(i).color).collect();
        assert_eq!(colors.len(), 7);
    }

    #[test]
    fn markers_are_around_their_point() {
        assert_eq!(
            circle((10.0, 20.0), 2.0),
            "M8.00 20.00 a2.00 2.00 0 1 0 4.00 0 a2.00 2.00 0 1 0 -4.00 0 Z"
        );
        let square = Mark::new(1).outline((0.0, 0.0));
        assert_eq!(square, "M-3.24 -3.24 L3.24 -3.24 L3.24 3.24 L-3.24 3.24 Z");
    }
}
