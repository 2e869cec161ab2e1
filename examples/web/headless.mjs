// Ask the page one question in headless Chromium with a WebGPU that runs on the processor, and print the answer.
// node headless.mjs URL QUESTION
import puppeteer from "puppeteer-core";

const [url, question] = process.argv.slice(2);
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
  protocolTimeout: 1_800_000,
});
try {
  const page = await browser.newPage();
  page.on("console", (message) => console.error(message.text().slice(0, 500)));
  await page.goto(url);
  const patient = { timeout: 1_800_000 };
  await page.waitForSelector("#question:not([disabled]), [data-failed]", patient);
  if (!(await page.$("[data-failed]"))) {
    await page.type("#question", question);
    await page.keyboard.press("Enter");
    await page.waitForSelector("[data-done], [data-failed]", patient);
  }
  const failed = (await page.$("[data-failed]")) !== null;
  console.log(await page.$eval(failed ? "#state" : ".assistant", (shown) => shown.textContent));
  process.exitCode = failed ? 1 : 0;
} finally {
  await browser.close();
}
