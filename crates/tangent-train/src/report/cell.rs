//! Cells of heat maps: the color of a value, and hatching where there is none.

use super::svg::{Area, Svg, path};

/// The viridis color map at even distances: equal differences look equal, and it stays in order
/// for color-blind readers and in black and white.
const VIRIDIS: [[u8; 3]; 10] = [
    [0x44, 0x01, 0x54],
    [0x48, 0x28, 0x78],
    [0x3e, 0x4a, 0x89],
    [0x31, 0x68, 0x8e],
    [0x26, 0x82, 0x8e],
    [0x1f, 0x9e, 0x89],
    [0x35, 0xb7, 0x79],
    [0x6d, 0xcd, 0x59],
    [0xb4, 0xde, 0x2c],
    [0xfd, 0xe7, 0x25],
];

/// A cell in the color of its place on the scale, or hatched.
pub fn draw_cell(svg: &mut Svg, cell: &Area, place: Option<f64>, title: &str) {
    if let Some(place) = place {
        svg.rect(cell, &[("fill", viridis(place).as_str())], title);
        return;
    }
    svg.rect(cell, &[("fill-opacity", "0.07")], title);
    let (x, y) = cell.center();
    let lines = [
        ((cell.left, y), (x, cell.top)),
        ((cell.left, cell.bottom), (cell.right, cell.top)),
        ((x, cell.bottom), (cell.right, y)),
    ];
    let data: Vec<String> = lines.iter().map(|(from, to)| path([*from, *to])).collect();
    let looks = [
        ("stroke", "currentColor"),
        ("stroke-opacity", "0.6"),
        ("pointer-events", "none"),
    ];
    svg.path(&data.join(" "), &looks, "");
}

/// The color at a place between 0 and 1, as `#rrggbb`.
pub fn viridis(place: f64) -> String {
    let last = VIRIDIS.len() - 1;
    let scaled = place.clamp(0.0, 1.0) * last as f64;
    let index = (scaled as usize).min(last - 1);
    let (from, to) = (VIRIDIS[index], VIRIDIS[index + 1]);
    let share = scaled - index as f64;
    let parts = from.iter().zip(&to).map(|(from, to)| {
        let (from, to) = (f64::from(*from), f64::from(*to));
        format!("{:02x}", (from + (to - from) * share).round() as u8)
    });
    format!("#{}", parts.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::super::well_formed::check;
    use super::*;

    #[test]
    fn colors_run_along_viridis() {
        assert_eq!(viridis(0.0), "#440154");
        assert_eq!(viridis(1.0), "#fde725");
        assert_eq!(viridis(1.0 / 3.0), "#31688e");
        assert_eq!((viridis(-3.0), viridis(9.0)), (viridis(0.0), viridis(1.0)));
        let gray = |c: &[u8; 3]| {
            0.2126 * f64::from(c[0]) + 0.7152 * f64::from(c[1]) + 0.0722 * f64::from(c[2])
        };
        assert!(VIRIDIS.is_sorted_by(|a, b| gray(a) < gray(b)));
    }

    #[test]
    fn cells_without_a_value_are_hatched_inside() {
        let cell = Area::around((20.0, 30.0), 10.0, 16.0);
        let mut svg = Svg::new(100.0, 100.0, "");
        draw_cell(&mut svg, &cell, Some(1.0), "full");
        draw_cell(&mut svg, &cell, None, "empty");
        let elements = check(&svg.finish()).unwrap();
        let names: Vec<&str> = elements.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["svg", "rect", "title", "rect", "title", "path"]);
        assert_eq!(
            (elements[1].get("fill"), elements[3].get("fill")),
            ("#fde725", "")
        );
        assert_eq!(
            elements[5].get("d"),
            "M15.00 30.00 L20.00 22.00 M15.00 38.00 L25.00 22.00 M20.00 38.00 L25.00 30.00"
        );
    }
}
