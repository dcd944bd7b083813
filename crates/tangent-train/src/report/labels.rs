//! Where labels go: beside points, each where it covers neither marks nor other labels, and in
//! columns.

use super::svg::{Area, Point, Svg, coordinate, shorten, text_width};

/// Room for a label in pixels.
const ROOM: f64 = 170.0;
const HEIGHT: f64 = 14.0;
/// Pixels from a point to its label at least, and how often a label goes further away.
const NEAR: f64 = 9.0;
const RINGS: usize = 8;
/// To the sides first: such labels read best.
const DIRECTIONS: [(f64, f64); 8] = [
    (1.0, 0.0),
    (-1.0, 0.0),
    (0.0, -1.0),
    (0.0, 1.0),
    (0.7, -0.7),
    (-0.7, -0.7),
    (0.7, 0.7),
    (-0.7, 0.7),
];

/// A label that has found its place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Label<'a> {
    text: &'a str,
    point: Point,
    area: Area,
    near: bool,
}

impl Label<'_> {
    /// Draws the label, and a line to its point if that is not right beside it.
    pub fn draw(&self, svg: &mut Svg) {
        if !self.near {
            let (x, y) = self.point;
            let edge = (
                x.max(self.area.left).min(self.area.right),
                y.max(self.area.top).min(self.area.bottom),
            );
            let looks = [("stroke", "currentColor"), ("stroke-opacity", "0.45")];
            svg.line(self.point, edge, &looks);
        }
        let down = coordinate(HEIGHT / 2.0 - 3.0);
        let looks = [("text-anchor", "middle"), ("dy", down.as_str())];
        svg.text(self.area.center(), self.text, ROOM, &looks);
    }
}

/// Gives every label the first place inside `bounds` where it covers nothing that is taken; a label
/// that finds none is left out.
pub fn place_labels<'a>(
    wanted: &[(&'a str, Point)],
    mut taken: Vec<Area>,
    bounds: &Area,
) -> Vec<Label<'a>> {
    let mut labels = Vec::new();
    for &(text, point) in wanted {
        let width = text_width(&shorten(text, ROOM)) + 4.0;
        let free = |(_, area): &(usize, Area)| {
            bounds.holds(area) && !taken.iter().any(|other| other.overlaps(area))
        };
        let found = places(point, width).find(free);
        if let Some((ring, area)) = found {
            taken.push(area);
            labels.push(Label {
                text,
                point,
                area,
                near: ring == 0,
            });
        }
    }
    labels
}

/// Places for a label around a point, from near to far, with the number of the ring.
fn places((x, y): Point, width: f64) -> impl Iterator<Item = (usize, Area)> {
    let place = move |ring: usize, (across, down): (f64, f64)| {
        let distance = NEAR + HEIGHT * ring as f64;
        let center = (
            x + across * distance + side(across) * width / 2.0,
            y + down * distance + side(down) * HEIGHT / 2.0,
        );
        (ring, Area::around(center, width, HEIGHT))
    };
    (0..RINGS).flat_map(move |ring| DIRECTIONS.map(|direction| place(ring, direction)))
}

/// -1, 0 or 1, unlike `signum` of zero.
fn side(share: f64) -> f64 {
    if share == 0.0 { 0.0 } else { share.signum() }
}

/// Ascending places at least `gap` apart and near the wanted, ascending ones; between `top` and
/// `bottom` if there is room.
pub fn spread(wanted: &[f64], gap: f64, top: f64, bottom: f64) -> Vec<f64> {
    let mut next = top;
    let mut places: Vec<f64> = wanted
        .iter()
        .map(|&wanted| {
            let place = wanted.max(next);
            next = place + gap;
            place
        })
        .collect();
    let mut limit = bottom;
    for place in places.iter_mut().rev() {
        *place = (*place).min(limit);
        limit = *place - gap;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::super::well_formed::check;
    use super::*;

    const BOUNDS: Area = Area {
        left: 0.0,
        top: 0.0,
        right: 400.0,
        bottom: 300.0,
    };

    #[test]
    fn labels_cover_neither_marks_nor_one_another() {
        let points: Vec<Point> = (0..30).map(|i| (200.0, 10.0 * f64::from(i))).collect();
        let marks: Vec<Area> = points
            .iter()
            .map(|p| Area::around(*p, 10.0, 10.0))
            .collect();
        let wanted: Vec<(&str, Point)> = points.iter().map(|p| ("method", *p)).collect();
        let labels = place_labels(&wanted, marks.clone(), &BOUNDS);
        assert!(labels.len() >= 25, "{}", labels.len());
        for (i, label) in labels.iter().enumerate() {
            assert!(BOUNDS.holds(&label.area), "{label:?}");
            assert!(
                !marks.iter().any(|mark| mark.overlaps(&label.area)),
                "{label:?}"
            );
            let mut others = labels.iter().skip(i + 1);
            assert!(
                !others.any(|other| other.area.overlaps(&label.area)),
                "{label:?}"
            );
        }
    }

    #[test]
    fn a_label_is_to_the_right_if_it_can_be() {
        let label = |x: f64| place_labels(&[("label", (x, 100.0))], Vec::new(), &BOUNDS)[0];
        let (free, at_edge) = (label(100.0), label(395.0));
        assert!((free.area.left - 109.0).abs() < 1e-9, "{free:?}");
        assert!((at_edge.area.right - 386.0).abs() < 1e-9, "{at_edge:?}");
        assert!((free.area.center().1 - 100.0).abs() < 1e-9, "{free:?}");
        assert!(free.near && at_edge.near);
    }

    #[test]
    fn far_labels_have_a_line_to_their_point() {
        let around = Area::around((200.0, 150.0), 60.0, 60.0);
        let labels = place_labels(&[("a", (200.0, 150.0))], vec![around], &BOUNDS);
        let mut svg = Svg::new(400.0, 300.0, "");
        labels[0].draw(&mut svg);
        let elements = check(&svg.finish()).unwrap();
        let line = elements.iter().find(|e| e.name == "line").unwrap();
        assert_eq!((line.number("x1"), line.number("y1")), (200.0, 150.0));
        let everywhere = place_labels(&[("a", (200.0, 150.0))], vec![BOUNDS], &BOUNDS);
        assert!(everywhere.is_empty());
    }

    #[test]
    fn labels_are_spread() {
        assert_eq!(
            spread(&[1.0, 1.0, 50.0], 10.0, 0.0, 100.0),
            [1.0, 11.0, 50.0]
        );
        assert_eq!(spread(&[99.0, 100.0], 10.0, 0.0, 100.0), [90.0, 100.0]);
        assert_eq!(spread(&[], 10.0, 0.0, 100.0), [0.0; 0]);
    }
}
