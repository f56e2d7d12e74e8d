/** Masks as COCO's compressed run lengths: {size: [height, width], counts}. */

const GOLDEN = 0.381966; // of the colour circle between neighbours: no two look alike

/** Lengths of runs, column by column, background first. */
export function runs(counts) {
  const lengths = [];
  for (let place = 0; place < counts.length;) {
    let value = 0;
    let shift = 0;
    let group;
    do {
      group = counts.charCodeAt(place++) - 48;
      value |= (group & 0x1f) << shift;
      shift += 5;
    } while (group & 0x20);
    if (group & 0x10) value |= -1 << shift; // the last group carries the sign
    lengths.push(lengths.length > 2 ? value + lengths.at(-2) : value);
  }
  return lengths;
}

/** Paints a mask into pixels (RGBA, row by row) of a picture of its size. */
export function paint(pixels, { size: [height, width], counts }, [red, green, blue], alpha) {
  let at = 0;
  runs(counts).forEach((length, index) => {
    for (const end = at + length; index % 2 && at < end; at++) {
      const place = 4 * ((at % height) * width + Math.floor(at / height));
      pixels[place] = red;
      pixels[place + 1] = green;
      pixels[place + 2] = blue;
      pixels[place + 3] = alpha;
    }
    if (index % 2 === 0) at += length;
  });
}

/** The colour of the label of this number, as three numbers up to 255; the server's pictures have
 * the same. */
export function colourOf(number) {
  const hue = ((number * GOLDEN) % 1) * 6;
  return [5, 3, 1].map((offset) => {
    const k = (offset + hue) % 6;
    return Math.round(255 * (1 - 0.8 * Math.max(0, Math.min(k, 4 - k, 1))));
  });
}

export const GRAY = [120, 120, 120]; // of what was refused

export const css = (colour) => `rgb(${colour.join(" ")})`;
